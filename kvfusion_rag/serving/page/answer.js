/** One answer on the page: its text, the documents it was given, and the same question in other orders and modes. */

import { complete } from "./server.js";

const ORIGINS = {
  memory: "KV from memory",
  disk: "KV from disk",
  remote: "KV from a remote store",
  computed: "KV computed now",
  prompt: "read in the prompt",
  blank: "blank",
};

export class AnswerView {
  /** Show an empty answer to `question` at the top of `list`. */
  constructor(list, question) {
    this.element = copyOf("answer-template").querySelector("article");
    this.part = (name) => this.element.querySelector(`.${name}`);
    this.part("asked").textContent = question;
    list.prepend(this.element);
    this.documents = [];
  }

  /** Show the documents before the answer is known. */
  showDocuments(documents) {
    this.documents = documents;
    this.part("given").hidden = documents.length === 0;
    this.part("documents").replaceChildren(...documents.map((document) => documentItem(document)));
  }

  /** Show one chunk of the stream. */
  add(chunk) {
    if (chunk.kvfusion?.documents) this.showDocuments(chunk.kvfusion.documents);
    const delta = chunk.choices[0]?.delta ?? {};
    if (delta.reasoning_content) {
      this.part("reasoning").hidden = false;
      this.part("reasoning").querySelector("p").append(delta.reasoning_content);
    }
    if (delta.content) this.part("text").append(delta.content);
    if (chunk.kvfusion?.sources) this.finish(chunk.kvfusion, chunk.choices[0].finish_reason);
  }

  /** Show where the answer comes from, and how long it took. */
  finish(facts, reason) {
    this.facts = facts;
    const { sources, citations, timings, mode } = facts;
    const most = Math.max(1, ...sources.map((source) => source.effect ?? 0));
    const items = this.documents.map((document, n) => documentItem(document, sources[n], citations, most));
    this.part("documents").replaceChildren(...items);
    const read = sources.filter((source) => source.used).length;
    const kvs = Object.entries(ORIGINS)
      .map(([origin, name]) => [sources.filter((source) => source.origin === origin).length, name])
      .filter(([count]) => count > 0)
      .map(([count, name]) => `${count} × ${name}`);
    const facing = citations.length || !sources.length ? [] : ["no document contains these words"];
    this.part("facts").textContent = [
      ...(facts.notice ? [facts.notice] : []),
      `first token after ${seconds(timings.first_token)}`,
      `whole answer ${seconds(timings.total)}`,
      `mode ${mode}`,
      ...(sources.length ? [`${read} of ${sources.length} documents read`] : []),
      ...kvs,
      ...facing,
      ...(reason === "length" ? ["cut at the token limit"] : []),
    ].join(" · ");
    this.end();
  }

  /** Show why there is no answer, or only a part of it. */
  fail(message) {
    this.part("facts").textContent = message;
    this.part("facts").classList.add("error");
    this.end();
  }

  end() {
    this.part("text").setAttribute("aria-busy", "false");
    const copy = this.part("copy");
    copy.hidden = !navigator.clipboard || !this.part("text").textContent; // browsers have none without TLS
    copy.onclick = async () => {
      await navigator.clipboard.writeText(this.part("text").textContent);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    };
  }

  /** Ask the same question with the documents in another order, and in one joined prompt. `body` was the request. */
  async compare(body, signal) {
    const order = shuffled(this.documents.map((_, n) => n));
    const inOrder = order.map((n) => this.documents[n]);
    const numbers = order.map((n) => n + 1).join(" ");
    this.part("shuffled").append(element("small", "quiet", `documents ${numbers}`));
    this.part("found").append(element("small", "quiet", `documents ${this.documents.map((_, n) => n + 1).join(" ")}`));
    this.part("comparison").hidden = false;
    const fused = this.facts.mode === "concat" ? "fusion" : this.facts.mode;
    const known = fused === this.facts.mode ? { text: this.part("text").textContent, timings: this.facts.timings } : null;
    const ask = (documents, options) => async () => {
      const reply = await complete({ ...body, attribution: null, documents, ...options }, signal);
      return { text: reply.choices[0].message.content, timings: reply.kvfusion.timings };
    };
    const separately = { mode: fused };
    const together = { mode: "concat", focus: null }; // as usual: the model reads all documents in one prompt
    await this.compareRow("KV-Fusion", "each document is read separately", [
      known ? async () => known : ask(this.documents, separately),
      ask(inOrder, separately),
    ]);
    await this.compareRow("One prompt", "documents are joined, as usual (concat)", [
      ask(this.documents, together),
      ask(inOrder, together),
    ]);
  }

  async compareRow(name, meaning, answers) {
    const head = element("th", "", name, element("small", "quiet", meaning));
    head.scope = "row";
    const cells = answers.map(() => element("td", "waiting", "…"));
    this.part("comparison").querySelector("tbody").append(element("tr", "", head, ...cells));
    const texts = [];
    for (const [n, answer] of answers.entries()) {
      const { text, timings } = await answer();
      texts.push(text);
      cells[n].className = "";
      cells[n].replaceChildren(text, element("small", "quiet", `first token after ${seconds(timings.first_token)}`));
    }
    const same = texts[0] === texts[1];
    const verdict = same ? "✓ the same in both orders" : "≠ the order changed the answer";
    head.append(element("small", same ? "same" : "different", verdict));
  }
}

/** Return one document of an answer, with the place of the answer marked once `source` is known. */
function documentItem(document, source, citations = [], most = 1) {
  const item = copyOf("document-template").querySelector("li");
  const part = (name) => item.querySelector(`.${name}`);
  const { file, chunk, place } = document.metadata ?? {};
  part("title").textContent = document.title || document.id || "Document";
  const placeText = (where) => [file, where ?? (chunk && `part ${chunk}`)].filter(Boolean).join(", ");
  part("place").textContent = placeText(place);
  part("passage").append(document.text);
  if (!source) return item;
  const cited = citations.filter((citation) => citation.document_id === source.id);
  if (cited[0]?.place) part("place").textContent = placeText(cited[0].place);
  item.classList.toggle("cited", cited.length > 0);
  item.classList.toggle("unread", !source.used);
  item.querySelector("details").open = cited.length > 0;
  part("origin").textContent = source.used ? ORIGINS[source.origin] : `${ORIGINS[source.origin]}, left out by focus`;
  part("origin").dataset.origin = source.origin;
  part("passage").replaceChildren(...marked(document.text, cited));
  if (source.used && source.effect !== undefined) {
    const effect = Math.abs(source.effect).toFixed(1);
    const sign = effect === "0.0" ? "" : source.effect < 0 ? "−" : "+";
    if (typeof source.attention === "number") {
      part("bars").append(...bar("attention", source.attention, 1, `${Math.round(100 * source.attention)} %`));
    }
    part("bars").append(...bar("effect", source.effect, most, `${sign}${effect} nats`));
  }
  return item;
}

/** Return `text` as nodes, with the cited spans in <mark>. Offsets count code points, as in Python. */
function marked(text, citations) {
  const points = [...text];
  const slice = (start, end) => points.slice(start, end).join("");
  const nodes = [];
  let at = 0;
  for (const { start, end } of [...citations].sort((a, b) => a.start - b.start)) {
    nodes.push(slice(at, start), element("mark", "", slice(start, end)));
    at = end;
  }
  return [...nodes, slice(at)];
}

function bar(name, value, max, shown) {
  const meter = element("meter", name);
  Object.assign(meter, { max, value: Math.max(0, value) });
  meter.setAttribute("aria-label", `${name} ${shown}`);
  return [element("dt", name, name), element("dd", "", meter, element("span", "", shown))];
}

/** Return the numbers in a random order that differs from theirs, if there are at least two. */
function shuffled(numbers) {
  if (numbers.length < 2) return numbers;
  const order = [...numbers];
  do {
    for (let n = order.length - 1; n > 0; n--) {
      const other = Math.floor(Math.random() * (n + 1));
      [order[n], order[other]] = [order[other], order[n]];
    }
  } while (order.every((number, n) => number === numbers[n]));
  return order;
}

export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function copyOf(id) {
  return document.getElementById(id).content.cloneNode(true);
}

function seconds(value) {
  return `${value < 1 ? value.toFixed(2) : value.toFixed(1)} s`;
}
