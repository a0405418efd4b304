"""An existing LCEL chain with a Chroma retriever needs two changed lines."""

import difflib
import json
import runpy
from pathlib import Path

import pytest
import tiny

pytest.importorskip("langchain_chroma")

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
BEFORE, AFTER = EXAMPLES / "langchain" / "before.py", EXAMPLES / "langchain" / "after.py"


def code_lines(path: Path) -> list[str]:
    """Return the lines of code without docstring and imports."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [line for line in lines if line.strip() and not line.startswith(("import ", "from "))]


def test_example_changes_two_lines():
    changes = [line for line in difflib.ndiff(code_lines(BEFORE), code_lines(AFTER)) if line[0] in "+-"]
    assert sum(line[0] == "-" for line in changes) == sum(line[0] == "+" for line in changes) == 2


def test_replacing_only_the_llm_logs_a_warning(caplog):
    from langchain_core.prompts import ChatPromptTemplate

    from langchain_kvfusion import KVFusionLLM

    prompt = ChatPromptTemplate.from_template("Answer from this.\n\n{context}\n\nQuestion: {question}")
    llm = KVFusionLLM(generator=tiny.generator(prompt_template=None), max_tokens=1)
    for _ in range(2):
        caplog.clear()
        (prompt | llm).invoke({"context": "joined text", "question": "who?"})
        assert "KVFusionPrompt.from_prompt" in caplog.text
    caplog.clear()
    llm.invoke("who?", documents=["the mill"])
    assert "KVFusionPrompt" not in caplog.text


@pytest.mark.slow
@pytest.mark.default_model
def test_changed_chain_answers_the_example_questions():
    names = runpy.run_path(str(AFTER))
    names["llm"].max_tokens = 32  # the chain uses the same object
    chain = names["chain"]
    rows = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [row for row in rows if row["source"].endswith((".md", ".txt"))]
    answers = chain.batch([row["question"] for row in asked])
    right = [
        row["question"]
        for row, answer in zip(asked, answers, strict=True)
        if any(a.casefold() in answer.casefold() for a in row["answers"])
    ]
    assert len(right) >= 5, f"only {right} of {len(asked)} questions were answered"
