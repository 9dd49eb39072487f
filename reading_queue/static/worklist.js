// The worklist: live rows that do not jump under the pointer, due times that count down, keys.
import { Refused, getText, keys, live, notice, post, waiting } from "/static/common.js";

const scroll = document.getElementById("scroll");
const search = document.querySelector("#search input[type=search]");
const list = () => document.getElementById("list");
const rows = () => [...document.querySelectorAll("#list tbody tr")];
let selected = null;
let pending = null; // a newer list that waits while the pointer is over the table
let hovering = false;
let skew = 0;

function select(id, show = false) {
  const all = rows();
  const row = all.find((one) => one.id === id) || all[0];
  selected = row ? row.id : null;
  for (const one of all) {
    one.classList.toggle("selected", one === row);
    one.setAttribute("aria-selected", String(one === row));
  }
  if (row && show) row.scrollIntoView({ block: "nearest" });
}

function tick() {
  const limit = Number(list().dataset.amber);
  for (const time of document.querySelectorAll("time[data-due]")) {
    const left = Math.floor((new Date(time.dateTime) - Date.now() - skew) / 1000);
    const whole = Math.abs(left);
    const hours = String(Math.floor(whole / 3600)).padStart(2, "0");
    const minutes = String(Math.floor((whole % 3600) / 60)).padStart(2, "0");
    time.textContent = left < 0 ? `−${hours}:${minutes} ${time.dataset.late}` : `${hours}:${minutes}`;
    time.className = left < 0 ? "red" : left < limit ? "amber" : "";
  }
}

function settle() { // after the list in the page was changed
  skew = new Date(list().dataset.now) - Date.now();
  const counts = document.querySelector("[data-counts]");
  document.getElementById("counts").innerHTML = counts.innerHTML;
  counts.hidden = true;
  select(selected);
  tick();
}

function bar(count) {
  document.querySelector(".newbar")?.remove();
  if (!count) return;
  const button = document.createElement("button");
  button.className = "newbar";
  button.textContent = scroll.dataset.new.replace("%count%", count);
  button.onclick = () => show(pending);
  scroll.prepend(button);
}

function show(fresh) {
  pending = null;
  bar(0);
  const top = scroll.scrollTop;
  list().replaceWith(fresh);
  scroll.scrollTop = top;
  settle();
}

function merge(html) {
  const fresh = document.createElement("div");
  fresh.innerHTML = html;
  const next = fresh.firstElementChild;
  const now = rows();
  const after = [...next.querySelectorAll("tbody tr")];
  const same = now.length === after.length && now.every((row, index) => row.id === after[index].id);
  if (same && now.length) {
    change(now, after);
    document.querySelector("[data-counts]").replaceWith(next.querySelector("[data-counts]"));
    list().dataset.now = next.dataset.now;
    settle();
  } else if (hovering && now.length) {
    change(now, after); // what is here changes in its place; what is new waits
    pending = next;
    const known = new Set(now.map((row) => row.id));
    bar(after.filter((row) => !known.has(row.id)).length);
    tick();
  } else {
    show(next);
  }
}

function change(now, after) {
  const found = new Map(after.map((row) => [row.id, row]));
  for (const row of now) {
    const newer = found.get(row.id);
    if (!newer || newer.outerHTML === row.dataset.html) continue;
    const copy = newer.cloneNode(true);
    copy.dataset.html = newer.outerHTML;
    row.replaceWith(copy);
  }
  select(selected);
}

async function refresh() {
  try {
    merge(await getText(`/worklist/rows${addressOf()}`));
  } catch (error) {
    if (!(error instanceof Refused)) throw error; // the stream says that the link is lost
  }
}

function addressOf() {
  return `?${new URLSearchParams(new FormData(document.getElementById("search")))}`;
}

async function open(row) {
  if (!row) return;
  const { case: id, state, mine } = row.dataset;
  if (state !== "queued" && !mine) {
    location.href = `/cases/${id}`;
    return;
  }
  try {
    location.href = (await waiting(post(`/cases/${id}/claim`))).location;
  } catch (error) {
    if (error.problem?.type === "taken") notice(scroll.dataset.taken.replace("%name%", error.problem.holder));
    else notice(error.message);
    refresh();
  }
}

async function next() {
  try {
    const specialty = document.getElementById("next").dataset.specialty;
    location.href = (await waiting(post("/worklist/next", { specialty }))).location;
  } catch (error) {
    notice(error.message);
  }
}

async function explain() {
  if (!selected) return;
  try {
    document.getElementById("order-body").innerHTML = await getText(`/worklist/${selected.slice(5)}/order`);
    document.getElementById("order").showModal();
  } catch (error) {
    notice(error.message);
  }
}

function step(by) {
  const all = rows();
  const index = all.findIndex((row) => row.id === selected);
  const target = all[Math.min(Math.max(index + by, 0), all.length - 1)];
  if (target) select(target.id, true);
}

const current = () => document.getElementById(selected);
keys({
  j: () => step(1),
  ArrowDown: () => step(1),
  k: () => step(-1),
  ArrowUp: () => step(-1),
  Enter: (event) => {
    // A button of a dialog that has just closed keeps the focus for a moment: that Enter is for the list.
    const control = event.target.closest("a, button");
    if (control && !control.closest("dialog")) control.click();
    else open(current());
  },
  n: next,
  e: explain,
  "/": () => search.focus(),
  "?": () => document.getElementById("keys").showModal(),
  Escape: () => { if (search.value) location.href = "/worklist"; },
});
search.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    event.preventDefault();
    search.blur();
  }
});
document.getElementById("next").addEventListener("click", next);
scroll.addEventListener("click", (event) => {
  const row = event.target.closest("tbody tr");
  if (!row || event.target.closest("button")) return;
  if (event.ctrlKey || event.metaKey) return; // the link opens in a new tab, to look
  event.preventDefault();
  select(row.id);
  open(row);
});
scroll.addEventListener("pointermove", (event) => { hovering = Boolean(event.target.closest("table")); });
scroll.addEventListener("pointerleave", () => {
  hovering = false;
  if (pending) show(pending);
});
document.body.addEventListener("htmx:afterSettle", settle);
settle();
setInterval(tick, 1000);
live(refresh);
