// The reading screen: a draft that saves itself and never loses a sentence, the lease's heartbeat, the signature, keys.
import { Refused, clock, getText, keys, notice, post, renewSession, waiting } from "/static/common.js";

const main = document.getElementById("reading");
const words = main.dataset;
const caseId = words.case;
const form = document.getElementById("editor");
const byId = (id) => document.getElementById(id);
const SAVE_AFTER_MS = 2000;

async function claim(target = caseId) {
  return waiting(post(`/cases/${target}/claim`));
}
async function next() {
  try {
    if (editor) await editor.flush();
    location.href = (await waiting(post("/worklist/next", { specialty: byId("next").dataset.specialty }))).location;
  } catch (error) {
    notice(error.message);
  }
}

class Editor {
  constructor() {
    this.lease = words.lease;
    this.revision = Number(words.revision);
    this.saved = this.text(); // as in the page when it came
    this.timer = 0;
    this.running = null;
    this.stopped = false; // while a person has to decide, nothing is sent
    this.state = byId("save-state");
    this.trouble = byId("trouble");
    form.addEventListener("input", () => this.touched());
    form.addEventListener("change", () => this.save());
    form.addEventListener("focusout", () => this.save());
    form.addEventListener("submit", (event) => event.preventDefault());
    window.addEventListener("beforeunload", (event) => { if (this.dirty()) event.preventDefault(); });
    setInterval(() => this.beat(), (Number(words.leaseS) * 1000) / 3);
  }

  text() {
    return Object.fromEntries(new FormData(form));
  }

  dirty() {
    return JSON.stringify(this.text()) !== JSON.stringify(this.saved);
  }

  touched() {
    clearTimeout(this.timer);
    if (!this.dirty()) return;
    this.say(words.tUnsaved);
    this.timer = setTimeout(() => this.save(), SAVE_AFTER_MS);
  }

  say(text, bad = false) {
    this.state.textContent = text;
    this.state.classList.toggle("bad", bad);
  }

  async save() {
    clearTimeout(this.timer);
    if (this.stopped || !this.dirty()) return;
    if (this.running) {
      await this.running;
      return this.save();
    }
    this.running = this.send(this.text());
    try {
      await this.running;
    } finally {
      this.running = null;
    }
  }

  async send(text) {
    const slow = setTimeout(() => this.say(words.tSaving), 300);
    try {
      const answer = await post(`/cases/${caseId}/draft`, {
        ...text, conclusion: text.conclusion || "", lease: this.lease, revision: this.revision,
      });
      this.revision = answer.revision;
      this.saved = text;
      this.say(words.tSaved.replace("%time%", clock(new Date())));
      if (this.dirty()) this.touched();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.refused(error);
    } finally {
      clearTimeout(slow);
    }
  }

  // Everything written is saved, or this throws.
  async flush() {
    if (this.revision === 0) this.saved = null; // the text of an earlier version, unchanged, is a draft too
    await this.save();
    if (this.dirty()) throw new Error(this.trouble.textContent || this.state.textContent);
  }

  refused(error) {
    const kind = error.problem.type;
    if (kind === "lease-lost") this.lost();
    else if (kind === "revision") this.conflict(error.problem);
    else if (kind === "signed") this.ask([words.tSigned]);
    else if (kind === "new-images") this.newImages();
    else if (error.status === 401) this.signedOut();
    else if (error.status === 0 || error.status >= 500) {
      this.say(words.tFailed, true);
      this.timer = setTimeout(() => this.save(), 5000);
    } else {
      this.say(error.message, true);
    }
  }

  // Shows words and buttons above the text.
  tell(parts) {
    this.trouble.replaceChildren(...parts);
    this.trouble.hidden = false;
    this.trouble.scrollIntoView({ block: "nearest" });
  }

  // The same, and sends nothing until one is pressed.
  ask(parts) {
    this.stopped = true;
    this.say(words.tUnsaved, true);
    this.tell(parts);
  }

  // The study has other images than this page showed: they must be seen before anything is signed.
  newImages() {
    words.newImages = "yes";
    this.tell([words.tLookAgain, button("reload", async () => {
      try {
        await this.flush();
        location.reload();
      } catch (error) {
        notice(error.message);
      }
    })]);
  }

  answered() {
    this.stopped = false;
    this.trouble.hidden = true;
  }

  lost() {
    this.ask([tool("t-lost"), button("claim", () => this.claimAgain())]);
  }

  async claimAgain() {
    try {
      this.lease = (await claim()).lease;
      this.answered();
      await this.save();
    } catch (error) {
      if (error.problem?.type === "taken") this.ask([words.tLostOther.replace("%name%", error.problem.holder)]);
      else if (error.status === 409) this.ask([words.tSigned]);
      else notice(error.message);
    }
  }

  conflict(problem) {
    if (!problem.text) return location.reload();
    const theirs = document.createElement("div");
    theirs.className = "theirs";
    theirs.textContent = `${problem.text.findings}\n— ${problem.text.impression}`;
    const time = clock(new Date(problem.saved_at));
    const question = words.tConflict.replace("%name%", problem.author).replace("%time%", time);
    this.ask([
      question, theirs,
      button("mine", () => { this.revision = problem.revision; this.answered(); this.save(); }),
      button("theirs", () => { this.revision = problem.revision; this.put(problem.text); this.saved = this.text(); this.answered(); }),
    ]);
  }

  signedOut() {
    this.ask([tool("t-session"), tool("sign-in"), button("go-on", async () => {
      try {
        if (!(await renewSession())) return notice(words.tOtherPerson);
        this.answered();
        await this.save();
        await this.beat();
      } catch (error) {
        notice(error.message);
      }
    })]);
  }

  put(text) {
    form.elements.findings.value = text.findings;
    form.elements.impression.value = text.impression;
    form.elements.language.value = text.language;
    for (const one of form.elements.conclusion) one.checked = one.value === text.conclusion;
  }

  async beat() {
    if (this.stopped) return;
    try {
      const answer = await post(`/cases/${caseId}/heartbeat`, { lease: this.lease });
      if (answer.new_images && !words.newImages) this.newImages();
    } catch (error) {
      if (error.problem?.type === "lease-lost") this.lost();
      else if (error.status === 401) this.signedOut();
    }
  }

  async handBack() {
    try {
      await this.flush();
      location.href = (await waiting(post(`/cases/${caseId}/hand-back`, { lease: this.lease }))).location;
    } catch (error) {
      notice(error.message);
    }
  }
}

function tool(name) {
  return document.querySelector("#tools").content.querySelector(`[data-tool="${name}"]`).cloneNode(true);
}
function button(name, action) {
  const made = tool(name);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

// --- the signature ---
const dialog = byId("sign-dialog");
const signTrouble = byId("sign-trouble");

async function openSign() {
  if (!editor || dialog.open) return;
  let found;
  try {
    await waiting(editor.flush());
    await editor.beat(); // keeps the case while the PIN is typed, or says that it is lost
    if (editor.stopped) return;
    found = JSON.parse(await waiting(getText(`/cases/${caseId}/checks`)));
  } catch (error) {
    return notice(error.message);
  }
  const arriving = !found.complete;
  if (String(found.images) !== words.images || (arriving && words.complete)) return editor.newImages();
  const text = editor.text();
  const lines = [];
  if (!text.impression.trim()) lines.push(["bad", words.tImpression]);
  if (!text.conclusion) lines.push(["bad", words.tConclusion]);
  const blocked = lines.length > 0;
  if (!text.findings.trim()) lines.push(["wait", words.tFindings]);
  if (words.newImages) lines.push(["wait", words.tNewImages]);
  if (arriving) lines.push(["wait", words.tIncomplete]);
  if (text.conclusion === "critical") lines.push(["bad", words.tCritical]);
  if (found.unprintable) lines.push(["wait", words.tUnprintable.replace("%characters%", found.unprintable)]);
  if (!blocked) lines.push(["good", words.tReady]);
  const marks = { bad: "◆ ", wait: "▲ ", good: "● " };
  const colours = { bad: "red", wait: "amber", good: "green" };
  byId("checks").replaceChildren(...lines.map(([kind, line]) => {
    const item = document.createElement("li");
    item.className = colours[kind];
    item.textContent = marks[kind] + line;
    return item;
  }));
  byId("incomplete-row").hidden = !arriving;
  byId("incomplete").required = arriving; // the browser lets the form go only when it is ticked
  byId("incomplete").checked = false;
  signTrouble.hidden = true;
  byId("pin").value = "";
  byId("pin").disabled = byId("sign-now").disabled = blocked;
  dialog.showModal();
  (blocked ? byId("sign-cancel") : byId("pin")).focus();
}

async function sign(event) {
  event.preventDefault();
  const pin = byId("pin").value;
  if (!pin || byId("sign-now").disabled) return;
  byId("sign-now").disabled = true;
  signTrouble.hidden = true;
  const slow = setTimeout(() => { signTrouble.textContent = words.tSigning; signTrouble.className = "message hand"; signTrouble.hidden = false; }, 300);
  try {
    const answer = await post(`/cases/${caseId}/sign`, {
      lease: editor.lease, revision: editor.revision, images: words.images, incomplete: byId("incomplete").checked, pin,
    });
    location.href = answer.location;
  } catch (error) {
    clearTimeout(slow);
    byId("sign-now").disabled = false;
    byId("pin").value = "";
    byId("pin").focus();
    signTrouble.textContent = error.message;
    signTrouble.className = "message bad";
    signTrouble.hidden = false;
    if (error.status === 409 || error.status === 401) {
      dialog.close();
      editor.refused(error);
    }
  } finally {
    clearTimeout(slow);
  }
}

const editor = form ? new Editor() : null;
if (editor) {
  byId("sign").addEventListener("click", openSign);
  byId("sign-form").addEventListener("submit", sign);
  byId("sign-cancel").addEventListener("click", () => dialog.close());
  byId("hand-back").addEventListener("click", () => editor.handBack());
  byId("versions").addEventListener("click", (event) => {
    const restore = event.target.closest("[data-restore]");
    if (!restore) return;
    editor.put(JSON.parse(restore.dataset.restore));
    editor.touched();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      event.preventDefault();
      openSign();
    } else if (event.key === "Escape" && form.contains(document.activeElement) && !event.isComposing) {
      event.preventDefault();
      document.activeElement.blur(); // single keys work again
    }
  });
}

async function takeCase() {
  try {
    await claim();
    location.reload();
  } catch (error) {
    notice(error.message);
    setTimeout(() => location.reload(), 1500);
  }
}
byId("claim")?.addEventListener("click", takeCase);
byId("next").addEventListener("click", next);
document.querySelector("[data-keys]").addEventListener("click", () => byId("keys").showModal());

const heat = byId("heat");
const toggle = document.querySelector(".heat-toggle");
function showHeat() {
  if (!toggle) return;
  const picture = heat.querySelector("img");
  if (!picture.src) picture.src = toggle.dataset.src;
  heat.hidden = !heat.hidden;
  toggle.setAttribute("aria-pressed", String(!heat.hidden));
}
toggle?.addEventListener("click", showHeat);

const swap = byId("swap");
swap?.addEventListener("click", () => {
  const viewer = byId("viewer");
  if (!viewer.src && viewer.dataset.src) viewer.src = viewer.dataset.src;
  viewer.hidden = !viewer.hidden;
  byId("report-frame").hidden = !viewer.hidden;
  swap.textContent = viewer.hidden ? swap.dataset.images : swap.dataset.report;
});

const leave = () => { location.href = "/worklist"; };
const bindings = {
  n: next,
  p: () => { byId("priors").open = !byId("priors").open; },
  h: showHeat,
  "?": () => byId("keys").showModal(),
  Escape: async () => {
    try {
      if (editor) await editor.flush();
      leave();
    } catch (error) {
      notice(error.message);
    }
  },
};
if (editor) {
  bindings.r = () => form.elements.findings.focus();
  bindings.i = () => form.elements.impression.focus();
  bindings.b = () => editor.handBack();
  bindings.c = () => {
    const critical = form.querySelector('input[value="critical"]');
    critical.checked = true;
    editor.save();
  };
}
if (byId("claim")) bindings.Enter = takeCase;
keys(bindings);
// OHIF in its frame has keys of its own; Esc brings the focus back.
byId("viewer").addEventListener("load", (event) => {
  event.target.contentDocument?.addEventListener("keydown", (key) => {
    if (key.key === "Escape") main.querySelector("#findings, #claim, #swap")?.focus();
  });
});
