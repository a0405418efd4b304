"""A server's own files: questions without documents are answered from them, and tenants add and remove their own."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from fakes import RecordingGenerator
from indexes import WordEmbedder, open_index
from serving_client import CHAT, events, request
from starlette.testclient import TestClient

from kvfusion_rag import InvalidInputError, Message, RetrievalError
from kvfusion_rag.serving import Access, ServingOptions, create_app
from kvfusion_rag.serving.library import Library, UploadSpace
from kvfusion_rag.serving.library.uploads import require_file_name

KEY, OTHER = "key-of-the-first-tenant", "key-of-the-other-tenant"
FERRY = "The ferry carries forty cars."
BAKERY = "The bakery was opened by Tomas Lindqvist."
UPLOAD, REMOVE = "/v1/library/upload", "/v1/library/remove"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "ferry.md").write_text(FERRY)
    (folder / "bakery.txt").write_text(BAKERY)
    return folder


@pytest.fixture
def library(docs: Path, tmp_path: Path) -> Iterator[Library]:
    with open_index() as index:
        index.update(docs)
        uploads = UploadSpace(tmp_path / "uploads", index.in_memory, max_files=3)
        yield Library(index, uploads=uploads, top_k=1, questions=["Who opened the bakery?"])


def client_of(library: Library | None, generator: Any = None, access: Access | None = None, **options: Any):
    app = create_app(
        generator or RecordingGenerator(), access=access, options=ServingOptions(**options), library=library
    )
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return request({"role": "user", "content": text}, **fields)


def upload(client: TestClient, name: str, content: bytes, key: str = KEY) -> Any:
    body = {"name": name, "content": base64.b64encode(content).decode()}
    return client.post(UPLOAD, json=body, headers=bearer(key))


def names(client: TestClient, key: str = KEY) -> list[str]:
    return [file["name"] for file in client.get("/v1/library", headers=bearer(key)).json()["files"]]


# Questions


@pytest.mark.parametrize("stream", [False, True])
def test_question_without_documents_is_answered_from_the_files(library, docs, stream):
    generator = RecordingGenerator()
    found = client_of(library, generator).post(CHAT, json=asked("Who opened the bakery?", stream=stream))
    first = next(events(found.text)) if stream else found.json()
    (document,) = first["kvfusion"]["documents"]
    assert document["text"] == BAKERY and document["id"] == "bakery.txt#1" and document["title"] == "bakery"
    assert generator.calls[0].texts == [BAKERY]
    assert str(docs) not in found.text, "paths of the server stay there"


def test_found_documents_can_be_sent_back(library):
    generator = RecordingGenerator()
    client = client_of(library, generator)
    documents = client.post(CHAT, json=asked("Who opened the bakery?")).json()["kvfusion"]["documents"]
    reply = client.post(CHAT, json=asked("Who opened the bakery?", documents=documents)).json()
    assert generator.calls[0].documents[0].text == generator.calls[1].documents[0].text == BAKERY
    assert "documents" not in reply["kvfusion"]


def test_answers_name_the_places_of_documents_that_were_found_or_sent_back(docs):
    (docs / "keepers.txt").write_text("The keepers were many.\nThomas Grant was the last.")
    generator = tiny.speaker("thomas grant", mode="fusion")
    with open_index() as index:
        index.update(docs)
        client = client_of(Library(index, top_k=1), generator)
        body = asked("Who was the last of the keepers?", model=generator.model_id)
        found = client.post(CHAT, json=body).json()["kvfusion"]
        sent = client.post(CHAT, json=body | {"documents": found["documents"]}).json()["kvfusion"]
    assert found["sources"][0]["place"] == "lines 1-2" and found["citations"][0]["place"] == "line 2"
    assert sent["sources"][0]["place"] == "lines 1-2" and sent["citations"] == found["citations"]


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"documents": ["mine"]}, ["mine"]),
        ({"documents": []}, []),
        ({"documents": None}, [BAKERY]),
        ({"retrieve": 0}, []),
        ({"retrieve": 2}, [BAKERY, FERRY]),
    ],
)
def test_request_decides_whether_its_documents_are_found(library, fields, texts):
    generator = RecordingGenerator()
    client_of(library, generator).post(CHAT, json=asked("Who opened the bakery?", **fields))
    assert generator.calls[0].texts == texts


@pytest.mark.parametrize("number", [-1, 1.5, True, "3", 3])
def test_wrong_number_of_documents_is_rejected(library, number):
    found = client_of(library, max_documents=2).post(CHAT, json=asked("Who?", retrieve=number))
    assert found.status_code == 400 and found.json()["error"]["param"] == "retrieve"


def test_server_without_files_has_no_library_and_answers_as_before():
    generator = RecordingGenerator()
    client = client_of(None, generator)
    assert client.get("/v1/library").status_code == 404
    assert client.post(CHAT, json=asked("Who?")).status_code == 200 and generator.calls[0].texts == []
    found = client.post(CHAT, json=asked("Who?", retrieve=1))
    assert found.status_code == 400 and "--docs" in found.json()["error"]["message"]


def test_contents_name_files_examples_and_limits(library):
    found = client_of(library, max_body_bytes=10_000).get("/v1/library").json()
    assert found["files"] == [{"name": "bakery.txt", "uploaded": False}, {"name": "ferry.md", "uploaded": False}]
    assert found["file_count"] == 2 and found["top_k"] == 1 and found["questions"] == ["Who opened the bakery?"]
    assert found["uploads"]["max_files"] == 3 and ".pdf" in found["uploads"]["types"]


def test_only_the_named_files_of_an_index_are_searched(docs):
    with open_index() as index:
        index.update(docs)
        library = Library(index, files=["ferry.md"])
        assert [found.text for found in library.search("", "Who opened the bakery?")] == [FERRY]
        assert Library(index, files=[]).search("", "Who?") == []


def test_long_questions_are_searched_by_their_beginning(docs):
    lengths: list[int] = []

    class Measuring(WordEmbedder):
        def embed_question(self, text: str) -> Any:
            lengths.append(len(text))
            return super().embed_question(text)

    with open_index(embedder=Measuring()) as index:
        index.update(docs)
        question = " " * 10_000 + "Who opened the bakery?" + " word" * 100_000
        assert Library(index).search("", question)[0].text == BAKERY and max(lengths) == 4000


def test_documents_of_the_files_are_found_in_the_store(docs):
    """A prefill with a bare user message makes the keys of the page's questions."""
    generator = tiny.generator()
    with open_index() as index:
        index.update(docs)
        generator.prefill(index.documents(), prompt=[Message("user", "?")], question="?")
        body = asked("Who opened the bakery?", model=generator.model_id, mode="fusion", max_tokens=1)
        (source,) = client_of(Library(index, top_k=1), generator).post(CHAT, json=body).json()["kvfusion"]["sources"]
    assert source["origin"] == "memory"


def test_update_reads_new_and_changed_files_and_drops_removed_ones(docs):
    with open_index() as index:
        library = Library(index, docs=[docs])
        assert library.update().added == ("bakery.txt", "ferry.md")
        (docs / "mill.md").write_text("The mill is old.")
        (docs / "bakery.txt").write_text("The bakery is closed.")
        (docs / "ferry.md").unlink()
        library.update()
        assert [file.name for file in library.files("")] == ["bakery.txt", "mill.md"]
        texts = {found.text for found in library.search("", "the", 9)}
        assert texts == {"The mill is old.", "The bakery is closed."}
        for file in docs.iterdir():
            file.unlink()
        with pytest.raises(RetrievalError, match="no files to index"):
            library.update()
        assert library.files("") == library.search("", "the", 9) == []


def test_questions_are_answered_while_new_files_are_embedded(docs):
    began, go_on = threading.Event(), threading.Event()

    class Slow(WordEmbedder):
        def embed_documents(self, texts: Sequence[str]) -> Any:
            if any("mill" in text for text in texts):
                began.set()
                assert go_on.wait(60)
            return super().embed_documents(texts)

    with open_index(embedder=Slow()) as index:
        library = Library(index, docs=[docs])
        library.update()
        (docs / "mill.md").write_text("The mill is old.")
        update = threading.Thread(target=library.update)
        update.start()
        assert began.wait(60)
        assert [found.text for found in library.search("", "Who opened the bakery?", 1)] == [BAKERY]
        assert [file.name for file in library.files("")] == ["bakery.txt", "ferry.md"]
        go_on.set()
        update.join(60)
        assert library.search("", "How old is the mill?", 1)[0].text == "The mill is old."


# Uploads


def test_uploaded_file_is_searched_by_its_tenant_only_until_it_is_removed(library, tmp_path):
    generator = tiny.generator()
    client = client_of(library, generator, Access({KEY: "a", OTHER: "b"}))
    assert upload(client, "mill.md", b"# Mill\n\nThe mill was built by Amara Osei.").json()["name"] == "mill.md"
    assert library.search_own("Who built the mill?", 1)[0].id != "upload:mill.md#1"
    assert names(client) == ["mill.md", "bakery.txt", "ferry.md"] and names(client, OTHER) == [
        "bakery.txt",
        "ferry.md",
    ]

    def found(key: str) -> dict[str, Any]:
        body = asked("Who built the mill?", model=generator.model_id, mode="fusion", max_tokens=1)
        return client.post(CHAT, json=body, headers=bearer(key)).json()["kvfusion"]

    assert found(KEY)["documents"][0]["id"] == "upload:mill.md#1" and found(KEY)["documents"][0]["title"] == "Mill"
    assert found(KEY)["sources"][0]["origin"] == "memory"
    assert "Osei" not in json.dumps(found(OTHER))
    assert client.post(REMOVE, json={"name": "mill.md"}, headers=bearer(OTHER)).status_code == 400
    removed = client.post(REMOVE, json={"name": "mill.md"}, headers=bearer(KEY)).json()
    assert removed["removed"] == 1, "its KV is removed, too"
    assert names(client) == ["bakery.txt", "ferry.md"] and "Osei" not in json.dumps(found(KEY))
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]


def test_upload_with_a_known_name_replaces_the_file(library):
    client = client_of(library, access=Access({KEY: None}))
    for text in (b"The mill is old.", b"The mill is new."):
        assert upload(client, "mill.md", text).status_code == 200
    found = client.post(CHAT, json=asked("How is the mill?", retrieve=9), headers=bearer(KEY)).json()
    texts = [document["text"] for document in found["kvfusion"]["documents"]]
    assert "The mill is new." in texts and "The mill is old." not in texts


def test_text_that_is_also_in_the_servers_files_is_found_once(library):
    client = client_of(library, access=Access({KEY: None}))
    assert upload(client, "copy.txt", BAKERY.encode()).status_code == 200
    found = client.post(CHAT, json=asked("Who opened the bakery?", retrieve=9), headers=bearer(KEY)).json()
    assert sorted(document["text"] for document in found["kvfusion"]["documents"]) == [BAKERY, FERRY]


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../up.md", "a/b.md", "a\\b.md", "/etc/passwd.md", "C:\\x.md", "c:x.md", ".hidden.md", "a\0.md",
        "a\n.md", "\u202emd.txt", "x.exe", "x", "x" * 300 + ".md", "é" * 120 + ".md", "\ud800.md",
    ],
)  # fmt: skip
def test_names_that_are_no_plain_file_names_are_rejected(library, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    client = client_of(library, access=Access({KEY: None}))
    sent = json.dumps({"name": name, "content": "dGV4dA=="})  # in ASCII, as lone surrogates cannot be sent otherwise
    found = client.post(UPLOAD, content=sent, headers={**bearer(KEY), "content-type": "application/json"})
    assert found.status_code == 400 and "file" in found.json()["error"]["message"]
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [p for p in before if p.is_file()]


@pytest.mark.parametrize("name", ["notes.md", "Über uns.TXT", "灯台.html", "a-b_c (1).pdf", "x..md"])
def test_ordinary_names_are_allowed(name):
    assert require_file_name(name) == name


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "contains no text"),
        ("binary.txt", bytes(range(256)) * 9, "cannot be read"),
        ("broken.pdf", b"%PDF-1.7 and nothing else", "cannot be read"),
        ("blank.html", b"<html><body>   </body></html>", "contains no text"),
    ],
)
def test_files_that_cannot_be_read_are_rejected_with_the_reason(library, name, content, reason):
    client = client_of(library, access=Access({KEY: None}))
    found = upload(client, name, content)
    assert found.status_code == 400 and reason in found.json()["error"]["message"]
    assert name not in names(client)


def test_rejected_file_does_not_replace_one_that_can_be_read(library):
    client = client_of(library, access=Access({KEY: None}))
    upload(client, "mill.txt", b"The mill is old.")
    assert upload(client, "mill.txt", b"\0" * 99).status_code == 400
    found = client.post(CHAT, json=asked("mill", retrieve=9), headers=bearer(KEY)).json()
    assert "The mill is old." in [document["text"] for document in found["kvfusion"]["documents"]]


@pytest.mark.parametrize(
    "body", [{}, {"name": "a.md"}, {"name": "a.md", "content": "%"}, {"name": "a.md", "content": 5}, [], "x"]
)
def test_bodies_of_another_form_are_rejected(library, body):
    found = client_of(library).post(UPLOAD, json=body)
    assert found.status_code == 400 and found.json()["error"]["message"]


def test_number_and_size_of_uploads_are_limited(library):
    client = client_of(library, access=Access({KEY: None}), max_body_bytes=5000)
    assert upload(client, "long.txt", b"word " * 2000).status_code == 413
    most = client.get("/v1/library", headers=bearer(KEY)).json()["uploads"]["max_bytes"]
    assert upload(client, "fits.txt", (b"word " * most)[:most]).status_code == 200
    assert [upload(client, f"{n}.txt", b"text").status_code for n in range(3)] == [200, 200, 400]
    assert upload(client, "0.txt", b"other text").status_code == 200, "a file of this name counts already"


def test_files_can_contain_as_many_quotes_as_fit(library):
    """A file is one string of the body, whatever it contains."""
    client = client_of(library, access=Access({KEY: None}))
    assert upload(client, "quotes.txt", b'["a", "b"], ' * 20_000).status_code == 200


def test_library_without_uploads_accepts_none(docs):
    with open_index() as index:
        index.update(docs)
        client = client_of(Library(index))
        assert client.get("/v1/library").json()["uploads"]["max_files"] == 0
        for path, body in ((UPLOAD, {"name": "a.md", "content": "eA=="}), (REMOVE, {"name": "ferry.md"})):
            found = client.post(path, json=body)
            assert found.status_code == 400 and "--max-uploads" in found.json()["error"]["message"]
    assert (docs / "ferry.md").exists()


def test_servers_own_files_cannot_be_removed(library, docs):
    found = client_of(library).post(REMOVE, json={"name": "ferry.md"})
    assert found.status_code == 400 and "no uploaded file" in found.json()["error"]["message"]
    assert (docs / "ferry.md").exists()


def test_kept_files_are_there_after_a_restart(docs, tmp_path):
    with open_index() as index:
        index.update(docs)
        first, second = (UploadSpace(tmp_path / "kept", index.in_memory) for _ in range(2))
        first.of("a").add("mill.md", b"The mill is old.")
        first.close()
        assert second.of("a").files() == ("mill.md",) and second.of("b").files() == ()
        assert second.of("a").search("mill", 3)[0].id == "upload:mill.md#1"


def test_failed_embedding_leaves_the_index_as_it_was(docs, tmp_path):
    embedder = WordEmbedder()
    with open_index(embedder=embedder) as index:
        uploads = UploadSpace(tmp_path / "kept", index.in_memory).of("")
        uploads.add("a.md", b"The mill is old.")
        embedder.failure = RuntimeError("no memory")
        with pytest.raises(RuntimeError):
            uploads.add("b.md", b"The ferry is new.")
        embedder.failure = None
        assert uploads.files() == ("a.md",) and len(uploads.search("mill", 9)) == 1
        assert [path.name for path in (tmp_path / "kept").rglob("*.md")] == ["a.md"]


def test_library_says_which_upload_does_not_exist(library):
    with pytest.raises(InvalidInputError, match=r"no uploaded file 'x\.md'"):
        library.uploads_of("").remove("x.md")


@pytest.mark.parametrize("path", ["/v1/library", UPLOAD, REMOVE])
def test_library_needs_a_key_if_the_server_has_keys(library, path):
    client = client_of(library, access=Access({KEY: None}))
    found = client.get(path) if path == "/v1/library" else client.post(path, json={"name": "a.md"})
    assert found.status_code == 401
