/** The page: questions, files, history, colours and keys. */

import { AnswerView, element } from "./answer.js";
import * as server from "./server.js";

const MAX_HISTORY = 30;
const LOOK_MILLISECONDS = 5000;
const HISTORY = "kvfusion.questions";
const THEME = "kvfusion.theme";
const THEMES = { system: "◐", light: "☀", dark: "☾" };

const $ = (id) => document.getElementById(id);
let model, library, running;
let starting; // ends when model and library are known
let attribution = "effects";

// Questions

async function ask(question) {
  running = new AbortController();
  setRunning(true);
  notify("");
  remember(question);
  const body = { model: model.id, messages: [{ role: "user", content: question }], attribution };
  if (!library) body.documents = pastedDocuments();
  const view = new AnswerView($("answers"), question);
  try {
    if (!library) view.showDocuments(body.documents);
    await show(view, body);
    if ($("compare").checked && view.documents.length > 1) await view.compare(body, running.signal);
  } catch (error) {
    const message = error.name === "AbortError" ? "Stopped." : error.message;
    if (view.facts) notify(message);
    else view.fail(message);
    if (error.status === 401) askForKey();
  }
  setRunning(false);
}

/** Show the stream of one answer, without attribution if the model cannot measure it. */
async function show(view, body) {
  try {
    for await (const chunk of server.stream(body, running.signal)) view.add(chunk);
  } catch (error) {
    if (error.code !== "unsupported_by_model") throw error;
    body.attribution = attribution = null;
    for await (const chunk of server.stream(body, running.signal)) view.add(chunk);
  }
}

function pastedDocuments() {
  const texts = $("documents").value.split(/\n\s*\n/).map((text) => text.trim()).filter(Boolean);
  return texts.map((text, n) => ({ id: String(n + 1), title: `Document ${n + 1}`, text }));
}

function setRunning(is) {
  $("ask").disabled = is;
  $("stop").hidden = !is;
}

async function submit() {
  const question = $("question").value.trim();
  await starting;
  if (question && model && !$("ask").disabled) ask(question);
}

function notify(message) {
  $("notice").textContent = message;
}

// Files

async function showLibrary() {
  library = await server.getLibrary();
  $("library").hidden = !library;
  $("pasted").hidden = Boolean(library);
  const order = model.kvfusion.mode === "concat" ? "" : ", and stays the same in any order of the documents";
  if (!library) {
    $("about").textContent = `Paste documents and ask. The answer shows the passage behind it${order}.`;
    return;
  }
  const { files, file_count: count, questions, uploads } = library;
  $("about").textContent = `An answer from ${count} file${count === 1 ? "" : "s"} shows the passages behind it${order}.`;
  $("files").replaceChildren(...files.map(fileItem));
  if (count > files.length) $("files").append(element("li", "quiet", `and ${count - files.length} more`));
  $("uploads").hidden = uploads.max_files === 0;
  $("upload").accept = uploads.types.join(",");
  $("examples").hidden = questions.length === 0;
  $("examples").replaceChildren(...questions.map((question) => questionButton(question, "example")));
}

/** Show files that the server has found since it was asked last, while somebody sees this page. */
async function lookForFiles() {
  if (document.hidden || !library?.watched) return;
  try {
    const present = await server.getLibrary();
    if (JSON.stringify(present.files) !== JSON.stringify(library.files)) await showLibrary();
  } catch {
    // The server is away. The next question will say so.
  }
}

function fileItem({ name, uploaded }) {
  const item = element("li", "", element("span", "", name));
  if (uploaded) {
    const button = element("button", "plain", "Remove");
    button.type = "button";
    button.setAttribute("aria-label", `Remove ${name}`);
    button.onclick = () => change(`Removing ${name} …`, `${name} was removed.`, () => server.remove(name));
    item.append(button);
  }
  return item;
}

async function upload(files) {
  await starting;
  if (!library?.uploads.max_files) return;
  for (const file of files) {
    if (file.size > library.uploads.max_bytes) {
      notify(`${file.name} is larger than ${(library.uploads.max_bytes / 2 ** 20).toFixed(1)} MiB, which is the limit of this server.`);
      return;
    }
    const done = await change(`Reading ${file.name} …`, `${file.name} was added.`, () => server.upload(file));
    if (!done) return;
  }
}

/** Change the files, and say what happens. Return whether it worked. */
async function change(doing, done, work) {
  notify(doing);
  try {
    await work();
    await showLibrary();
    notify(done);
    return true;
  } catch (error) {
    notify(error.message);
    return false;
  }
}

// History

function remember(question) {
  const kept = [question, ...history().filter((other) => other !== question)].slice(0, MAX_HISTORY);
  localStorage.setItem(HISTORY, JSON.stringify(kept));
  showHistory();
}

function history() {
  return JSON.parse(localStorage.getItem(HISTORY) ?? "[]");
}

function showHistory() {
  const questions = history();
  $("history").replaceChildren(...questions.map((question) => element("li", "", questionButton(question, "plain"))));
  $("no-history").hidden = questions.length > 0;
  $("clear").hidden = questions.length === 0;
}

function questionButton(question, className) {
  const button = element("button", className, question);
  button.type = "button";
  button.onclick = () => {
    $("question").value = question;
    submit();
  };
  return button;
}

// Colours, keys, and the start

function setTheme(theme) {
  localStorage.setItem(THEME, theme);
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = THEMES[theme];
  $("theme").setAttribute("aria-label", `Colours: ${theme}`);
}

function askForKey() {
  $("key-form").hidden = false;
  $("question-form").hidden = $("api").hidden = true; // a link cannot send the key
  $("key").focus();
}

async function start() {
  try {
    model = await server.getModel();
    $("model").textContent = `${model.id} · ${model.kvfusion.mode}`;
    await showLibrary();
    $("key-form").hidden = true;
    $("question-form").hidden = false;
    $("question").focus();
  } catch (error) {
    if (error.status === 401) askForKey();
    notify(error.status === 401 && !$("key").value ? "" : error.message);
  }
}

$("question-form").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  server.setKey($("key").value.trim());
  notify("");
  starting = start();
};
$("stop").onclick = () => running.abort();
$("clear").onclick = () => {
  localStorage.removeItem(HISTORY);
  showHistory();
};
$("theme").onclick = () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
};
$("upload").onchange = async () => {
  await upload([...$("upload").files]);
  $("upload").value = "";
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !$("question").value && history().length) {
    event.preventDefault();
    $("question").value = history()[0];
  }
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && !$("stop").hidden) running.abort();
  if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) {
    event.preventDefault();
    $("question").focus();
  }
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.toggle("dropping", Boolean(library?.uploads.max_files));
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
};
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  upload([...event.dataTransfer.files]);
};

setTheme(localStorage.getItem(THEME) ?? "system");
showHistory();
starting = start();
setInterval(lookForFiles, LOOK_MILLISECONDS);
