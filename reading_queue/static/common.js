// What every page shares: requests with the CSRF token, notices, live changes, keys that are off while typing.
const meta = (name) => document.querySelector(`meta[name="${name}"]`).content;
let csrf = meta("csrf");
export const account = meta("account");
const words = document.body.dataset;

export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || String(status));
    this.status = status;
    this.problem = problem;
  }
}

async function request(url, options) {
  let answer;
  try {
    answer = await fetch(url, { credentials: "same-origin", ...options });
  } catch {
    throw new Refused(0, { type: "offline", detail: words.offline });
  }
  if (answer.ok) return answer;
  let problem = {};
  try {
    problem = await answer.json();
  } catch { /* a proxy's page: the status says enough */ }
  throw new Refused(answer.status, problem);
}

export async function post(url, fields = {}) {
  const answer = await request(url, {
    method: "POST",
    headers: { "X-CSRF-Token": csrf, Accept: "application/json" },
    body: new URLSearchParams(fields),
  });
  return answer.json();
}

export async function getText(url) {
  return (await request(url, { headers: { Accept: "*/*" } })).text();
}

// After a new sign-in in another window: the new token, if it is the same person.
export async function renewSession() {
  const facts = await (await request("/session", { headers: { Accept: "application/json" } })).json();
  if (String(facts.account_id) !== account) return false;
  csrf = facts.csrf;
  return true;
}

// A moment as a clock on the centre's wall shows it, wherever this browser is.
export function clock(moment) {
  return new Intl.DateTimeFormat("en-GB", { timeZone: words.timeZone, hour: "2-digit", minute: "2-digit" }).format(moment);
}

const noticeBox = document.getElementById("notice");
let noticeTimer = 0;
export function notice(text, { seconds = 8 } = {}) {
  clearTimeout(noticeTimer);
  noticeBox.textContent = text;
  noticeBox.hidden = !text;
  if (text && seconds) noticeTimer = setTimeout(() => { noticeBox.hidden = true; }, seconds * 1000);
}

// Shows what is waited for when it takes longer than 0.3 s.
export async function waiting(promise, text = words.working) {
  const timer = setTimeout(() => notice(text, { seconds: 0 }), 300);
  try {
    return await promise;
  } finally {
    clearTimeout(timer);
    if (noticeBox.textContent === text) notice("");
  }
}

export function typing(event) {
  const target = event.target;
  return event.isComposing || event.keyCode === 229 || event.ctrlKey || event.metaKey || event.altKey
    || target.isContentEditable || target.matches("textarea, select, input:not([type=radio], [type=checkbox])");
}

export function keys(bindings) {
  document.addEventListener("keydown", (event) => {
    if (typing(event)) return;
    const open = document.querySelector("dialog[open]");
    if (open) return; // a dialog has its own keys; Esc closes it
    const action = bindings[event.key];
    if (action) {
      event.preventDefault();
      action(event);
    }
  });
}

// Calls `changed` when something changed at the centre, and once after each reconnection.
export function live(changed) {
  let lost = false;
  const hear = (name) => {
    if (name === "signed-out") notice(words.signedOut, { seconds: 0 });
    else if (name === "lost") {
      lost = true;
      setTimeout(() => lost && notice(words.linkLost, { seconds: 0 }), 3000);
    } else {
      if (lost) notice("");
      if (name === "changed" || lost) changed();
      lost = false;
    }
  };
  if ("SharedWorker" in window) {
    const worker = new SharedWorker("/static/stream-worker.js");
    worker.port.onmessage = (event) => hear(event.data);
    window.addEventListener("pagehide", () => worker.port.postMessage("bye"));
    window.addEventListener("pageshow", (event) => event.persisted && location.reload());
    return;
  }
  const source = new EventSource("/stream");
  for (const name of ["ready", "changed", "signed-out"]) source.addEventListener(name, () => hear(name));
  source.onerror = () => hear("lost");
}

document.addEventListener("click", async (event) => {
  const copy = event.target.closest("[data-copy]");
  if (copy) await navigator.clipboard.writeText(copy.dataset.copy);
});
document.body.addEventListener("htmx:configRequest", (event) => { event.detail.headers["X-CSRF-Token"] = csrf; });
document.body.addEventListener("htmx:responseError", (event) => {
  let detail = "";
  try { detail = JSON.parse(event.detail.xhr.responseText).detail; } catch { /* no problem details */ }
  notice(detail || words.offline);
});
document.body.addEventListener("htmx:sendError", () => notice(words.offline));
