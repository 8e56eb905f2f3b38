// What the page knows, and the stream that keeps it true. One connection; the gateway reads the database once
// for all pages. After a break the browser asks for what it missed, or is given everything anew.

const SILENCE_MS = 15000;
const LONGEST_WAIT_MS = 10000;

export const state = {
  known: false,
  jobs: new Map(),
  queue: { waiting: 0, order: [] },
  workers: [],
  day: {},
  curves: new Map(),
  link: "connecting",
  away: null,
  clockOffset: 0,
};

const watchers = new Set();
const storyWatchers = new Set();
let scheduled = false;
let source = null;
let retryAt = 1000;
let heardAt = 0;
let onStranger = () => {};

/** Now, by the gateway's clock, in milliseconds. */
export const now = () => Date.now() + state.clockOffset;
export const secondsSince = (instant) => (instant ? (now() - Date.parse(instant)) / 1000 : null);

/** Called after each change and once a second; returns how to stop. */
export function watch(call) {
  watchers.add(call);
  return () => watchers.delete(call);
}

/** Called with new lines of any job's story and new points of curves. */
export function watchStory(call) {
  storyWatchers.add(call);
  return () => storyWatchers.delete(call);
}

export function changed() {
  if (scheduled) return;
  scheduled = true;
  // Not an animation frame: those stand still in a page that nobody looks at.
  setTimeout(() => {
    scheduled = false;
    for (const call of watchers) call();
  }, 30);
}
setInterval(changed, 1000);

function take(event, read) {
  heardAt = Date.now();
  const told = JSON.parse(event.data);
  state.clockOffset = Date.parse(told.now) - Date.now();
  state.link = "live";
  retryAt = 1000;
  read(told);
  changed();
}

function takeSnapshot(told) {
  state.known = true;
  state.jobs = new Map(told.jobs.map((job) => [job.job_id, job]));
  state.curves = new Map(Object.entries(told.curves));
  state.queue = told.queue;
  state.workers = told.workers;
  state.day = told.day;
  for (const call of storyWatchers) call({ anew: true });
}

function takeChange(told) {
  for (const job of told.jobs ?? []) state.jobs.set(job.job_id, job);
  for (const id of told.gone ?? []) {
    state.jobs.delete(id);
    state.curves.delete(id);
  }
  for (const [id, curve] of Object.entries(told.curves ?? {})) state.curves.set(id, curve);
  extend(told.points, "points");
  extend(told.validation, "validation");
  for (const part of ["queue", "workers", "day"]) if (told[part]) state[part] = told[part];
  for (const call of storyWatchers) call(told);
}

function extend(news, name) {
  for (const [id, points] of Object.entries(news ?? {})) {
    const curve = state.curves.get(id);
    if (!curve) continue;
    const last = curve[name].at(-1)?.[0] ?? -1;
    curve[name].push(...points.filter(([step]) => step > last));
    if (curve.points.length > 600) curve.points = curve.points.filter((_, i) => i % 2 === 0 || i === curve.points.length - 1);
  }
}

/** Open the stream. `stranger` is called when the gateway no longer knows who we are. */
export function connect(stranger) {
  onStranger = stranger;
  open();
}

export function disconnect() {
  source?.close();
  source = null;
  state.known = false;
}

function open() {
  source?.close();
  heardAt = Date.now();
  source = new EventSource("/dashboard/stream");
  const mine = source;
  source.addEventListener("snapshot", (event) => take(event, takeSnapshot));
  source.addEventListener("change", (event) => take(event, takeChange));
  source.addEventListener("beat", (event) => take(event, (told) => (state.away = told.away)));
  source.addEventListener("error", () => {
    state.link = "reconnecting";
    changed();
    // The browser itself tries again, unless it was answered with a refusal.
    if (mine === source && mine.readyState === EventSource.CLOSED) setTimeout(() => mine === source && again(), retryAt);
  });
}

async function again() {
  retryAt = Math.min(retryAt * 2, LONGEST_WAIT_MS);
  const mine = source;
  const answer = await fetch("/dashboard/session").catch(() => null);
  if (mine !== source || !source) return;
  if (answer?.status === 401) {
    disconnect();
    onStranger();
  } else open();
}

// A connection may die without a word (a laptop asleep, a proxy gone): the gateway beats every five seconds.
setInterval(() => {
  if (source && Date.now() - heardAt > SILENCE_MS) {
    state.link = "reconnecting";
    changed();
    open();
  }
}, 2000);

/** A write or a question to the gateway. Throws an Error with its words and its hint. */
export async function ask(path, { method = "GET", body } = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: { "X-Dashboard": "1" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Error("The gateway does not answer. Is it running?");
  }
  if (answer.status === 204) return null;
  const told = await answer.json().catch(() => ({}));
  if (answer.ok) return told;
  if (answer.status === 401 && path !== "/dashboard/login" && source) {
    disconnect();
    onStranger();
  }
  throw Object.assign(new Error([told.error ?? `The gateway answered ${answer.status}.`, told.hint].filter(Boolean).join(" ")), {
    status: answer.status,
  });
}
