// The first view: five numbers, the hosts, what trains, what waits and why, what is done.

import { el, say, mark, KeyedList } from "./dom.js";
import { sparkline } from "./chart.js";
import { state, watch, now, secondsSince } from "./store.js";
import * as f from "./format.js";

const UNDER_WAY = ["initializing", "running", "lost"];
const SHOWN_AT_FIRST = 10;

/** Build the view into an element; returns how to end it. */
export function overview(view) {
  const numbers = statistics();
  const search = el("input", {
    type: "search",
    id: "filter",
    placeholder: "Filter",
    autocomplete: "off",
    spellcheck: "false",
    "aria-label": "Filter jobs by model, dataset, id, owner or error",
    on: { input: () => show() },
  });
  const hosts = section("Hosts", "hosts", "No host is alive. A daemon registers here when it starts.");
  const running = section("Training", "running", "Nothing is training.", runningHead());
  const waiting = section("Waiting", "waiting", "Nothing waits.");
  const ended = section("Finished", "ended", "Nothing has finished yet.");
  const hostList = new KeyedList(hosts.list, hostCard);
  const runningList = new KeyedList(running.list, runningRow);
  const waitingList = new KeyedList(waiting.list, waitingRow);
  const endedList = new KeyedList(ended.list, endedRow);
  for (const part of [waiting, ended]) part.more.addEventListener("click", () => show());

  view.replaceChildren(
    el("h1", { class: "hidden", text: "Overview" }),
    el("div", { class: "top" }, numbers.element, search),
    hosts.element,
    running.element,
    el("div", { class: "columns" }, waiting.element, ended.element),
  );

  function show() {
    mark(view, "aria-busy", state.known ? "false" : "true");
    if (!state.known) return;
    const matches = filter(search.value);
    const jobs = [...state.jobs.values()];
    const underWay = jobs
      .filter((job) => UNDER_WAY.includes(job.state))
      .sort((a, b) => f.words(a.started_at ?? "9").localeCompare(f.words(b.started_at ?? "9")) || a.job_id.localeCompare(b.job_id));
    const done = jobs
      .filter((job) => job.completed_at && !UNDER_WAY.includes(job.state) && job.state !== "queued")
      .sort((a, b) => Date.parse(b.completed_at) - Date.parse(a.completed_at));
    numbers.update(underWay, jobs);
    hosts.show(hostList, state.workers, (host) => host.worker_id, state.workers.length);
    running.show(runningList, underWay.filter(matches), (job) => job.job_id, underWay.length);
    waiting.show(waitingList, queued(jobs).filter(matches), (job) => job.job_id, countWaiting());
    ended.show(endedList, done.filter(matches), (job) => job.job_id, done.length);
  }

  show();
  return watch(show);
}

/** Queued jobs in claiming order, each with why it waits; those that came since the queue was read where they belong. */
function queued(jobs) {
  const known = new Map(jobs.filter((job) => job.state === "queued").map((job) => [job.job_id, job]));
  const inOrder = [];
  for (const [id, reason] of state.queue.order) {
    const job = known.get(id);
    if (!job) continue;
    known.delete(id);
    inOrder.push({ ...job, waiting_reason: reason });
  }
  for (const job of known.values()) {
    const place = inOrder.findIndex((other) => isBefore(job, other));
    inOrder.splice(place < 0 ? inOrder.length : place, 0, job);
  }
  return inOrder;
}

function isBefore(job, other) {
  const isLater = (one) => Date.parse(one.run_after ?? 0) > now();
  if (isLater(job) !== isLater(other)) return isLater(other);
  if (job.priority !== other.priority) return job.priority > other.priority;
  return Date.parse(job.queued_at) < Date.parse(other.queued_at);
}

/** How many wait: as the queue was read, and what has come and gone since. */
function countWaiting() {
  const inOrder = new Set(state.queue.order.map(([id]) => id));
  const gone = state.queue.order.filter(([id]) => state.jobs.has(id) && state.jobs.get(id).state !== "queued").length;
  const come = [...state.jobs.values()].filter((job) => job.state === "queued" && !inOrder.has(job.job_id)).length;
  return state.queue.waiting - gone + come;
}

function filter(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return () => true;
  return (job) =>
    [job.model, job.dataset, job.job_id, job.user_id, job.state, job.stage, job.error_code, job.error_message, job.waiting_reason]
      .map((value) => f.words(value).toLowerCase())
      .some((value) => value.includes(wanted));
}

function section(title, name, emptyWords, head = null) {
  const number = el("span", { class: "number" });
  const list = el("ul", { class: name, "aria-label": title });
  const empty = el("p", { class: "empty", text: emptyWords });
  const more = el("button", { class: "quiet more", type: "button", hidden: true, "aria-expanded": "false" });
  const element = el("section", { class: `part ${name}-part` }, el("h2", {}, title, number), head, list, empty, more);
  const folds = name === "waiting" || name === "ended";
  more.addEventListener("click", () =>
    more.setAttribute("aria-expanded", String(more.getAttribute("aria-expanded") !== "true")),
  );
  return {
    element,
    list,
    more,
    show(keyed, items, keyOf, total) {
      const open = !folds || more.getAttribute("aria-expanded") === "true";
      keyed.show(open ? items : items.slice(0, SHOWN_AT_FIRST), keyOf);
      say(number, total ? f.count(total) : "");
      empty.hidden = items.length > 0;
      say(empty, total > 0 && !items.length ? "Nothing matches the filter." : emptyWords);
      if (head) head.hidden = !items.length;
      more.hidden = !folds || items.length <= SHOWN_AT_FIRST;
      say(more, open ? "Show fewer" : `Show ${f.count(items.length - SHOWN_AT_FIRST)} more`);
    },
  };
}

function statistics() {
  const facts = ["training", "waiting", "GPUs busy", "tokens a second", "ended in 24 h", "spent in 24 h"].map((name) => {
    const value = el("span");
    const note = el("span", { class: "note" });
    return { name, value, note, element: el("div", {}, el("dt", { text: name }), el("dd", {}, value, note)) };
  });
  const set = (name, text, note = "") => {
    const fact = facts.find((one) => one.name === name);
    say(fact.value, text);
    say(fact.note, note);
  };
  return {
    element: el("dl", { class: "numbers", "aria-label": "The service at a glance" }, ...facts.map((fact) => fact.element)),
    update(underWay) {
      const live = state.workers.filter((host) => !["gone", "lost"].includes(host.state));
      const sum = (values) => values.reduce((total, value) => total + (f.isNumber(value) ? value : 0), 0);
      set("training", f.count(underWay.length));
      set("waiting", f.count(countWaiting()));
      const busy = sum(live.map((host) => host.busy));
      // A host that is out of service takes no job: of its GPUs only those that still work on one count.
      const usable = sum(live.map((host) => (host.state === "out_of_service" ? host.busy : host.slots)));
      set("GPUs busy", `${f.count(busy)} of ${f.count(usable)}`);
      set("tokens a second", f.count(sum(underWay.filter((job) => job.state === "running").map((job) => f.metric(job, "throughput")))));
      const { completed, failed, cancelled } = state.day;
      set(
        "ended in 24 h",
        f.isNumber(completed) ? f.count(sum([completed, failed, cancelled])) : "–",
        failed > 0 ? ` ${f.count(failed)} failed` : "",
      );
      set("spent in 24 h", f.money(state.day.cost));
    },
  };
}

function hostCard() {
  const name = el("b");
  const what = el("span", { class: "muted" });
  const status = el("span", { class: "state" });
  const slots = el("div", { class: "slots", "aria-hidden": "true" });
  const busy = el("span");
  const load = el("span");
  const seen = el("span", { class: "muted" });
  const troubles = el("ul", { class: "troubles small" });
  const listed = new KeyedList(troubles, () => {
    const item = el("li");
    const told = (trouble) => `${trouble.name.charAt(0).toUpperCase()}${trouble.name.slice(1)}: ${trouble.message}`;
    return { element: item, update: (trouble) => say(item, told(trouble)) };
  });
  const element = el(
    "li",
    { class: "card" },
    el("div", { class: "line" }, name, status),
    el("div", { class: "line small" }, what, seen),
    slots,
    el("div", { class: "line small" }, busy, load),
    troubles,
  );
  return {
    element,
    update(host) {
      say(name, host.host);
      const gpus = host.device === "cpu" ? "CPU" : `${host.gpu_count} × ${f.words(host.gpu_type ?? "GPU").replace(/^NVIDIA /, "")}`;
      const memory = f.isNumber(host.gpu_memory_gb) && !/\d ?GB/i.test(gpus) ? ` · ${Math.round(host.gpu_memory_gb)} GB` : "";
      say(what, gpus + memory);
      say(status, host.state.replaceAll("_", " "));
      // What a host that is gone said last is no news.
      const now = ["gone", "lost"].includes(host.state) ? [] : (host.troubles ?? []);
      listed.show(now, (trouble) => trouble.name);
      mark(troubles, "hidden", now.length === 0);
      mark(status, "data-state", host.state);
      const shown = Math.min(Math.max(host.slots, 1), 16);
      while (slots.childElementCount > shown) slots.lastElementChild.remove();
      while (slots.childElementCount < shown) slots.append(el("i"));
      [...slots.children].forEach((slot, i) => mark(slot, "class", i < host.busy ? "busy" : null));
      const loads = [...state.jobs.values()]
        .filter((job) => job.worker_id === host.worker_id && UNDER_WAY.includes(job.state))
        .map((job) => f.metric(job, "gpu_utilization"))
        .filter((value) => value !== null);
      const mean = loads.length ? loads.reduce((a, b) => a + b, 0) / loads.length : null;
      say(busy, `${host.busy} of ${host.slots} busy`);
      say(load, mean === null ? "" : `GPU ${f.percent(mean)}`);
      say(seen, `seen ${f.ago(secondsSince(host.last_seen_at))}`);
    },
  };
}

// -- what trains --------------------------------------------------------------------------------------------------

const COLUMNS = ["Job", "Loss", "Now", "Progress", "Tokens/s", "GPU", "Cost", "Left"];

function runningHead() {
  return el("div", { class: "head", "aria-hidden": "true" }, ...COLUMNS.map((text) => el("span", { text })));
}

/** A cell with its label, which is read out, and shown where there is no head (on a phone). */
function cell(label, value, name = null) {
  return el("div", { class: `cell ${name ?? ""}` }, el("span", { class: "label", text: label }), value);
}

export function jobHref(job) {
  return `#/jobs/${encodeURIComponent(job.job_id)}`;
}

function nameOf() {
  const model = el("b");
  const dataset = el("span", { class: "muted" });
  const link = el("a", { class: "name" }, model, dataset);
  return {
    link,
    update(job, remark) {
      mark(link, "href", jobHref(job));
      mark(link, "title", `${f.words(job.model) || "the service's default model"}, job ${job.job_id}`);
      say(model, f.shortModel(job.model));
      say(dataset, remark);
    },
  };
}

function runningRow() {
  const name = nameOf();
  const curve = sparkline();
  const loss = el("span", { class: "strong" });
  const bar = el("progress", { max: 100, "aria-label": "progress" });
  const stage = el("span", { class: "muted" });
  const speed = el("span");
  const gpu = el("span");
  const cost = el("span");
  const left = el("span");
  const element = el(
    "li",
    { class: "row" },
    name.link,
    el("div", { class: "cell curve" }, curve.element),
    cell("loss ", loss, "now"),
    el("div", { class: "cell way" }, bar, stage),
    cell("tokens a second ", speed, "speed"),
    cell("GPU ", gpu, "gpu"),
    cell("cost ", cost, "cost"),
    cell("left ", left, "left"),
  );
  return {
    element,
    update(job) {
      mark(element, "data-state", job.state);
      mark(element, "data-job", job.job_id);
      name.update(job, [job.dataset, f.shortId(job.job_id)].filter(Boolean).join(" · "));
      curve.update(state.curves.get(job.job_id), job.total_steps);
      say(loss, f.loss(f.metric(job, "training_loss")));
      if (bar.value !== job.progress) bar.value = job.progress;
      say(stage, wayWords(job));
      say(speed, f.count(f.metric(job, "throughput")));
      say(gpu, f.percent(f.metric(job, "gpu_utilization")));
      say(cost, f.money(job.cost));
      say(left, leftWords(job));
    },
  };
}

export function wayWords(job) {
  const at = `${Math.floor(job.progress)} %`;
  if (job.state === "lost") return `${at} · its host is silent`;
  if (job.state === "running" && job.stage === "training" && job.total_steps)
    return `${at} · step ${f.count(job.step)} of ${f.count(job.total_steps)}`;
  return `${at} · ${f.words(job.stage)}`;
}

export function leftWords(job) {
  return job.estimated_completion_at && job.state === "running"
    ? f.span((Date.parse(job.estimated_completion_at) - now()) / 1000)
    : "–";
}

// -- what waits, what is done -------------------------------------------------------------------------------------

function waitingRow() {
  const name = nameOf();
  const reason = el("span");
  const since = el("span", { class: "muted" });
  const element = el("li", { class: "short" }, name.link, el("span", { class: "remark" }, reason, since));
  return {
    element,
    update(job) {
      mark(element, "data-job", job.job_id);
      name.update(job, [job.dataset, f.shortId(job.job_id)].filter(Boolean).join(" · "));
      const at = job.run_after ? (Date.parse(job.run_after) - now()) / 1000 : 0;
      say(reason, (job.waiting_reason ?? "new") + (at > 0 ? `, in ${f.span(at)}` : ""));
      say(since, `queued ${f.ago(secondsSince(job.queued_at))}`);
    },
  };
}

function endedRow() {
  const name = nameOf();
  const status = el("span", { class: "state" });
  const when = el("span", { class: "muted" });
  const element = el("li", { class: "short" }, name.link, el("span", { class: "remark" }, status, when));
  return {
    element,
    update(job) {
      mark(element, "data-job", job.job_id);
      mark(element, "data-state", job.state);
      const why = job.state === "failed" ? f.words(job.error_message) : [job.dataset, f.shortId(job.job_id)].filter(Boolean).join(" · ");
      name.update(job, why);
      say(status, job.state === "failed" ? `failed: ${f.words(job.error_code) || "unknown"}` : job.state);
      mark(status, "data-state", job.state);
      const ran = job.started_at ? (Date.parse(job.completed_at) - Date.parse(job.started_at)) / 1000 : null;
      const cost = f.isNumber(job.cost) && job.cost > 0 ? ` · ${f.money(job.cost)}` : "";
      say(when, `${f.ago(secondsSince(job.completed_at))}${ran === null ? "" : ` · ran ${f.span(ran)}`}${cost}`);
    },
  };
}
